"""Data: data sets, the order of images, decoding, augmentation and pipelines."""
