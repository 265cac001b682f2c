//! The values at which arithmetic goes wrong, for proofs that cross them with each other.

/// Where a width ends, a sign turns or a sum wraps, from 2 bytes to 8.
pub const EDGES: [u64; 8] = [
    0,
    1 << 15,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 55, // a sector's number, of which the byte's wraps
    1 << 63,
    u64::MAX,
];

/// Each value with its neighbours, modulo 2^64; in order, each once.
pub fn around(values: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let neighbours = |value: u64| [value.wrapping_sub(1), value, value.wrapping_add(1)];
    let mut all: Vec<u64> = values.into_iter().flat_map(neighbours).collect();
    all.sort_unstable();
    all.dedup();
    all
}
