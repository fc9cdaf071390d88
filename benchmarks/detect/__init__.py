"""How every score tells known from unknown images, on the bundled benchmark and on splits of CIFAR-10."""
