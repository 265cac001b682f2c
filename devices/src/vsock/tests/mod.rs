//! The device through the real transport, driven by a guest made of a ring driver and a loop turned by hand.

mod abuse;
mod close;
mod guest;
mod streams;
