//! `capsid-vmm` with threads that obey the drill (`drill.rs` of the library): the same program in everything else. For the tests
//! of the program alone.

#[path = "../main.rs"]
mod program;

fn main() {
    program::main();
}
