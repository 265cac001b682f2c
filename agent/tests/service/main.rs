//! The agent's service from outside, on real containers: see `guest.rs` for what it needs.

mod guest;
mod limits;
mod pods;
mod process;
mod refusals;
mod security;
mod terminal;
