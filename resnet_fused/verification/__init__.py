"""Verification: of a fused model (`rf.verify`), and of every kernel on a device (`resnet-fused verify --device`)."""
