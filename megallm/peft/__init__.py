"""Parameter-efficient fine-tuning: adapters in the slots of the parallel model."""
