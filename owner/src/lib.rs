//! What every owner of a VM does, whoever it is: `capsid run` with its blocking threads, or a pod's shim with its event loop.
//!
//! - [`files`]: where the VMM, the guest kernel and the initramfs are.
//! - [`machine`]: starts a VMM with exactly the fds that its configuration names.
//! - [`channel`]: the owner channel, over which the two hand each other connections of the guest.
//! - [`end`]: what the end of a VMM says, and to whom.
//! - [`mounts`]: detached mounts, of which a share's tree is made.
//! - [`host`]: the KVM and the memory of this machine.
//! - [`escape`]: bytes of strangers, made fit to be shown.
//!
//! No thread is started here and nothing waits, but for the fork and exec of a VMM: how to wait is the owner's choice. What a VMM sends is
//! hostile. Nothing is mounted in the host's mount namespace.

pub mod channel;
pub mod end;
pub mod escape;
pub mod files;
pub mod host;
pub mod machine;
pub mod mounts;
mod spawn;

pub use channel::Owner;
