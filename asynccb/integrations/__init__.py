"""Other people's libraries beside a training: one small file for each, which alone imports it."""
