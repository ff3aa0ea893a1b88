"""The elastic server: one universal model that answers requests at any size."""
