//! What the whole-system tests are written with: a way to run `capsid` as a person would, and a ledger of
//! everything on the host that a run could leave behind.
//!
//! The tests need root, a KVM that runs Linux, and `capsid`, `capsid-vmm`, the guest kernel and the initramfs
//! where `capsid` looks for them. `CAPSID_TEST_IMAGE` names the busybox image. What is absent fails by name.

pub mod bench;
pub mod bundle;
pub mod capsid;
pub mod command;
pub mod containerd;
pub mod control;
pub mod cost;
pub mod crio;
pub mod guest;
pub mod ledger;
pub mod pty;
pub mod tap;
pub mod tree;
pub mod vmm;
