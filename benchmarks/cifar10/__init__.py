"""A small CIFAR-10 CLIP, trained by one command: the second real model that benchmarks run on."""
