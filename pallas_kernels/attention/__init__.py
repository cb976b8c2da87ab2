"""Dense attention for prefill."""
