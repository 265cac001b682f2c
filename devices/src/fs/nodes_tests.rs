use super::*;
use proptest::prelude::*;

fn fd() -> Arc<OwnedFd> {
    Arc::new(std::fs::File::open("/dev/null").expect("/dev/null").into())
}

fn key(ino: u64, kind: u32) -> Key {
    Key {
        mount: 1,
        dev: 1,
        ino,
        kind,
        born: 0,
    }
}

fn table(open_max: usize) -> NodeTable {
    NodeTable::new(fd(), key(0, libc::S_IFDIR), open_max)
}

fn dir(table: &mut NodeTable, parent: u64, name: &CStr, ino: u64) -> u64 {
    table
        .enter(parent, name, key(ino, libc::S_IFDIR))
        .expect("room")
}

fn forget(table: &mut NodeTable, id: u64, lookups: u64) {
    table.forget(id, lookups, &mut Vec::new());
}

#[test]
fn a_walk_starts_at_the_nearest_open_ancestor() {
    let mut table = table(8);
    let a = dir(&mut table, ROOT_ID, c"a", 1);
    let b = dir(&mut table, a, c"b", 2);
    let c = dir(&mut table, b, c"c", 3);
    assert_eq!(table.walk(c).unwrap().paths, [c"a/b/c".to_owned()]);
    assert!(table.keep(a, fd()).is_none());
    assert_eq!(table.walk(c).unwrap().paths, [c"b/c".to_owned()]);
    assert!(table.walk(99).is_err());
}

#[test]
fn a_walk_longer_than_a_path_is_cut_into_pieces() {
    let mut table = table(8);
    let name = CString::new("x".repeat(255)).unwrap();
    let mut node = ROOT_ID;
    for ino in 1..=100 {
        node = dir(&mut table, node, &name, ino);
    }
    let walk = table.walk(node).unwrap();
    assert!(
        walk.paths
            .iter()
            .all(|path| path.count_bytes() <= WALK_PATH_MAX_BYTES)
    );
    let names: usize = walk
        .paths
        .iter()
        .map(|p| p.to_bytes().split(|b| *b == b'/').count())
        .sum();
    assert_eq!(names, 100);
}

#[test]
fn a_chain_as_deep_as_a_guest_can_make_it_ends_in_stale_and_is_freed() {
    let mut table = table(8);
    let mut nodes = vec![ROOT_ID];
    for ino in 1..=100_000 {
        let parent = *nodes.last().unwrap();
        nodes.push(dir(&mut table, parent, c"d", ino));
    }
    assert!(matches!(
        table.walk(*nodes.last().unwrap()),
        Err(Errno::STALE)
    ));
    for node in &nodes[1..nodes.len() - 1] {
        forget(&mut table, *node, 1);
    }
    assert_eq!(
        table.len(),
        100_001,
        "a parent stays while a child names it"
    );
    forget(&mut table, *nodes.last().unwrap(), 1);
    assert_eq!(table.len(), 1);
}

#[test]
fn the_longest_unused_descriptor_is_closed_first() {
    let mut table = table(3);
    let ids: Vec<u64> = (1..=4)
        .map(|ino| dir(&mut table, ROOT_ID, c"d", ino))
        .collect();
    assert!(table.keep(ids[0], fd()).is_none());
    assert!(table.keep(ids[1], fd()).is_none());
    // Over the budget: every one was just used, so the hand goes round once.
    assert!(table.keep(ids[2], fd()).is_some());
    assert_eq!(table.open_count(), 3);
    assert!(table.fd(ids[0]).unwrap().is_none());
    assert!(table.fd(ids[1]).unwrap().is_some());
    assert!(table.keep(ids[3], fd()).is_some());
    assert!(table.fd(ids[1]).unwrap().is_some(), "used since");
    assert!(table.fd(ids[2]).unwrap().is_none());
    assert!(table.fd(ROOT_ID).unwrap().is_some(), "the root always");
}

#[test]
fn a_directory_never_becomes_its_own_ancestor() {
    let mut table = table(8);
    let a = dir(&mut table, ROOT_ID, c"a", 1);
    let b = dir(&mut table, a, c"b", 2);
    // The host moved b out of a and a into b; the guest sees the second first.
    table.moved(a, b, c"a");
    assert!(table.is_at(a, ROOT_ID, c"a"));
    assert_eq!(table.walk(b).unwrap().paths, [c"a/b".to_owned()]);
    table.moved(b, ROOT_ID, c"b");
    table.moved(a, b, c"a");
    assert_eq!(table.walk(a).unwrap().paths, [c"b/a".to_owned()]);
    forget(&mut table, a, 1);
    forget(&mut table, b, 1);
    assert_eq!(table.len(), 1);
}

#[test]
fn opening_and_forgetting_for_ever_does_not_grow_the_ring() {
    let mut table = table(4);
    for ino in 1..10_000 {
        let id = dir(&mut table, ROOT_ID, c"d", ino);
        assert!(table.keep(id, fd()).is_none());
        forget(&mut table, id, 1);
    }
    assert!(table.ring.len() <= 2 * 4 + 17, "{}", table.ring.len());
    assert_eq!((table.open_count(), table.len()), (1, 1));
}

#[test]
fn content_is_the_same_only_if_its_stamp_is_certain_and_equal() {
    let mut table = table(4);
    let file = table.enter(ROOT_ID, c"f", key(1, libc::S_IFREG)).unwrap();
    let stamp = |changed, size| Some(Stamp { changed, size });
    assert!(!table.opened(file, stamp(1, 1)));
    assert!(table.opened(file, stamp(1, 1)));
    assert!(!table.opened(file, stamp(2, 1)));
    assert!(!table.opened(file, stamp(2, 2)));
    assert!(!table.opened(file, None));
    assert!(!table.opened(file, None));
    assert!(!table.opened(file, stamp(2, 2)));
    assert!(!table.opened(99, stamp(2, 2)));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Enter(usize, u64),
    Forget(usize, u64),
    Keep(usize),
    Pin(usize),
    Moved(usize, usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let node = 0..12usize;
    let step = prop_oneof![
        (node.clone(), 1..12u64).prop_map(|(parent, ino)| Step::Enter(parent, ino)),
        (node.clone(), 0..3u64).prop_map(|(id, count)| Step::Forget(id, count)),
        node.clone().prop_map(Step::Keep),
        node.clone().prop_map(Step::Pin),
        (node.clone(), node).prop_map(|(id, parent)| Step::Moved(id, parent)),
    ];
    prop::collection::vec(step, 0..200)
}

proptest! {
    #[test]
    fn whatever_happens_the_counts_are_right(steps in steps()) {
        let mut table = table(4);
        let mut ids = vec![ROOT_ID];
        for step in steps {
            let id = |index: usize| *ids.get(index % ids.len()).unwrap_or(&ROOT_ID);
            match step {
                Step::Enter(parent, ino) => {
                    if let Ok(new) = table.enter(id(parent), c"n", key(ino, libc::S_IFDIR)) {
                        ids.push(new);
                    }
                }
                Step::Forget(node, count) => forget(&mut table, id(node), count),
                Step::Keep(node) => drop(table.keep(id(node), fd())),
                Step::Pin(node) => table.pin(id(node)),
                Step::Moved(node, parent) => table.moved(id(node), id(parent), c"m"),
            }
            let open = table.nodes.values().filter(|node| node.fd.is_some()).count();
            let pinned = table.nodes.values().filter(|node| node.pinned).count();
            prop_assert_eq!(table.open, open);
            prop_assert_eq!(table.pinned, pinned);
            prop_assert!(open <= 4.max(pinned + 1), "{} open, {} pinned", open, pinned);
            prop_assert_eq!(table.by_key.len(), table.nodes.len());
            for (id, node) in &table.nodes {
                let children = table.nodes.iter().filter(|(c, n)| **c != ROOT_ID && n.parent == *id);
                prop_assert_eq!(node.children, children.count() as u64);
                prop_assert!(node.lookups > 0 || node.children > 0);
                prop_assert!(table.nodes.contains_key(&node.parent));
                prop_assert!(table.walk(*id).is_ok());
            }
        }
    }
}
