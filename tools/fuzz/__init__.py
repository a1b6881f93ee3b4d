"""Loops of random inputs that look for wrong answers, crashes and hangs. README.md says what each of them tries."""
