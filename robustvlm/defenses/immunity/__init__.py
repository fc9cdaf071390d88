"""The immunised classifier: prototypes, antibodies, a vaccinated adapter, and thresholds to refuse by."""
