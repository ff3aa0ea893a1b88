"""What training needs and costs on a TPU slice, from the TPU compiler, with no TPU."""
