"""The app that Flower runs: two doors into the fedclip that is installed on each machine."""
