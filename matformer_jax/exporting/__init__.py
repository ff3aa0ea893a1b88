"""What is traced for other runtimes, and what they compute compared with what we compute."""
