"""Model families: what differs between SDAR and LLaDA, and nothing else. loading.py is the way in."""
