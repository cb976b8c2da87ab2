"""The `jaxinfer` command: generate, chat, eval, info, convert."""
