//! `containerd-shim-capsid-v2`. See the library.

fn main() {}
