"""Import path of the guide; everything lives in `fedclip.models`."""
