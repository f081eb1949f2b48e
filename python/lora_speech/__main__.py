"""`python -m lora_speech` is `lora-speech`."""

from lora_speech.cli import main

main()
