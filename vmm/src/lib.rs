//! One microVM: KVM, memory, boot, event loop, jail.
