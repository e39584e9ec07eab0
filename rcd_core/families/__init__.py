"""Model families: only what differs between SDAR and LLaDA. Entry point: loading.py."""
