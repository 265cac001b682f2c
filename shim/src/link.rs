//! What is in the network namespace of a pod.

use std::fs::File;
use std::io::{self, Read};

/// Longest list of links that is read, in bytes: some 500 links.
const DEV_MAX_BYTES: u64 = 64 << 10;
/// Links that the kernel puts into every new namespace (`net.core.fb_tunnels_only_for_init_net`): they lead nowhere.
const EVERYWHERE: [&str; 10] = [
    "lo", "tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0",
    "ip6gre0",
];

/// Whether somebody has put a link into the network namespace of thread `tid` of this process.
///
/// # Errors
/// The kernel's list cannot be read.
pub fn any(tid: u32) -> io::Result<bool> {
    let mut dev = String::new();
    let file = File::open(format!("/proc/self/task/{tid}/net/dev"))?;
    file.take(DEV_MAX_BYTES).read_to_string(&mut dev)?;
    Ok(names(&dev).any(|name| !EVERYWHERE.contains(&name)))
}

/// The names in `/proc/net/dev`: two lines of headings, then one for each link, its name in front of a colon.
fn names(dev: &str) -> impl Iterator<Item = &str> {
    let lines = dev.lines().skip(2);
    lines.filter_map(|line| line.split_once(':').map(|(name, _)| name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parked::{Network, Parked};

    #[test]
    fn a_link_of_a_pod_is_told_from_those_that_every_namespace_has() {
        let head = "Inter-|   Receive\n face |bytes\n";
        let dev = format!("{head}    lo: 1 2\n tunl0: 0 0\n  eth0: 3 4\n");
        assert_eq!(names(&dev).collect::<Vec<_>>(), ["lo", "tunl0", "eth0"]);
    }

    #[tokio::test]
    async fn a_new_namespace_has_none() {
        let root = File::open("/tmp").expect("a directory").into();
        let parked = Parked::start(Network::New, root).await.expect("root");
        assert!(!any(parked.pid()).expect("/proc"));
    }
}
