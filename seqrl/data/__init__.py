"""The data room: files and procedural tasks in, tokenized prompts out, and the order they are taken in."""
