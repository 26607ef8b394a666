"""What tests share: scenarios that run in processes of their own, fakes, and makers of small things."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository's root."""
