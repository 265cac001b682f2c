//! Fuzz targets: what a stranger writes, against the code that reads it. `cargo xtask test --suite fuzz` runs each for a while.
//!
//! The layout is cargo-fuzz's. A target is a function of this library, so that its seeds run as unit tests too, with no
//! compiler of C++; `fuzz_targets/` makes programs of them, with the feature `libfuzzer`. Trusts nothing and touches nothing of
//! the host: files are in memory. A target checks what has to hold afterwards, not only that nothing panics.

mod config;
mod control;
mod kernel;
mod transport;

/// A target: one input, which is the stranger's.
type Target = fn(&[u8]);

/// Each target by its name, which is that of its file in `fuzz_targets/` and of its directory in `seeds/`.
const TARGETS: [(&str, Target); 4] = [
    ("config", config::run),
    ("control", control::run),
    ("kernel", kernel::run),
    ("transport", transport::run),
];

/// Runs a target on one input.
///
/// # Panics
/// Something did not hold; or there is no such target.
pub fn run(target: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, run) = found.expect("a target of this name");
    run(input);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn every_seed_holds() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
        for (name, run) in TARGETS {
            let seeds = std::fs::read_dir(seeds.join(name)).expect("seeds of each target");
            let mut count = 0;
            for seed in seeds {
                run(&std::fs::read(seed.expect("a seed").path()).expect("a file"));
                count += 1;
            }
            assert!(count > 0, "{name} has no seeds");
        }
    }
}
