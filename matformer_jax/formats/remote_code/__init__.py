"""What is copied beside exported weights; it needs torch and transformers, not this package."""
