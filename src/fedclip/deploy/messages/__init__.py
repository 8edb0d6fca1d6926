"""Messages between coordinator and sites."""
