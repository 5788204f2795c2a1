"""Parameter-efficient adaptations of SAM."""
