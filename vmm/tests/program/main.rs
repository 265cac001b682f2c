//! The program as its owner starts it, on a real KVM, the host's or the testbed's: how guests end, what is
//! refused, what the jail holds. Needs root and /dev/kvm; what cannot run here says so by name.

mod cgroup;
mod control;
mod drill;
mod guests;
mod harness;
mod host_side;
mod hostile;
mod jail;
mod owner;
mod refusals;
mod usage;
