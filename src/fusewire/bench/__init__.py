"""The command `fusewire bench`: our ops and compiled models against what else there is, in one process group."""
