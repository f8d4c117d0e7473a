"""The images: which there are (sources), in which order (batches), how varied (augment)."""
