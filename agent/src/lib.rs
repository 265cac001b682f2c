//! PID 1 of the guest: OCI containers, their streams and their end, served over vsock.
