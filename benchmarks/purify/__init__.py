"""What purifier and mapper do for the certificates, and against attacks."""
