"""What two-level group convolution over ranks is compared with."""
