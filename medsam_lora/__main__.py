"""``python -m medsam_lora`` is ``medsam-lora``."""

from medsam_lora.cli import main

if __name__ == "__main__":
    main()
