//! The program as its owner starts it, on this machine's KVM: how guests end, what is refused, what the jail
//! holds. Needs root and /dev/kvm; what cannot run here says so by name.

mod guests;
mod harness;
mod jail;
mod owner;
mod refusals;
