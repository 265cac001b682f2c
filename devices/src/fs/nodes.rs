//! The nodes that the guest knows, without a file descriptor for each.
//!
//! A node is a file of the share that the guest has looked up. It is kept as *where it was last seen*
//! (parent node and name) and *which file that was* (mount, device, inode, birth time). An `O_PATH`
//! descriptor is only a cache: at most [`NodeTable::new`]'s budget of them is open, the longest unused is
//! closed first, and a node without one is opened again by walking its names from the nearest ancestor that
//! has one, one `openat2` for all of them, and comparing the file found with the file it must be. If it is
//! another one the guest gets ESTALE, on which Linux looks the path up again.
//!
//! So a guest that looks at a million files costs memory (about 200 bytes each, at most [`NODES_MAX`] of
//! them) and no descriptors. A file whose last known name is removed keeps its descriptor, because nothing
//! else leads to it any more: it is *pinned*.
//!
//! All of it is plain data under one lock that is never held across a system call.

use super::abi::ROOT_ID;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// Most nodes of one share; the guest gets ENFILE beyond it, and room again by forgetting.
pub(crate) const NODES_MAX: usize = 1 << 21;
/// Most names between a node and its nearest open ancestor.
pub(crate) const WALK_MAX_NAMES: usize = 4096;
/// Longest path given to one `openat2`, bytes (`PATH_MAX` is 4096 with the NUL).
const WALK_PATH_MAX_BYTES: usize = 4000;

/// Which file a node is. Two names with one key are one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) mount: u64,
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    /// The file type bits of its mode (`S_IFMT`), which no file ever changes.
    pub(crate) kind: u32,
    /// Birth time in nanoseconds, which tells an inode number used again; 0 where it does not hold still.
    pub(crate) born: i64,
}

/// What a file's content was when the guest last opened it: no change leaves both as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Time of the last change, nanoseconds.
    pub(crate) changed: i64,
    /// Size in bytes.
    pub(crate) size: u64,
}

struct Node {
    key: Key,
    opened: Option<Stamp>,
    /// How often the guest looked it up and did not forget.
    lookups: u64,
    /// How many nodes name this one as their parent.
    children: u64,
    parent: u64,
    name: Box<CStr>,
    fd: Option<Arc<OwnedFd>>,
    /// Used since the eviction hand last passed.
    used: bool,
    pinned: bool,
}

/// How to reach a node that has no descriptor: from `base`, through each of `paths` in turn.
pub(crate) struct Walk {
    pub(crate) base: Arc<OwnedFd>,
    pub(crate) paths: Vec<CString>,
    pub(crate) key: Key,
}

/// The shortest way to a node.
pub(crate) enum Reach {
    /// It is open.
    Open(Arc<OwnedFd>),
    /// It is this name in that node.
    Named {
        parent: u64,
        name: CString,
        key: Key,
    },
}

/// See the module text.
pub(crate) struct NodeTable {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    next: u64,
    /// Nodes with a descriptor that may be closed, in the order of the eviction hand.
    ring: VecDeque<u64>,
    open: usize,
    pinned: usize,
    open_max: usize,
}

impl NodeTable {
    /// A table that knows only the root, and keeps at most `open_max` descriptors.
    pub(crate) fn new(root: Arc<OwnedFd>, key: Key, open_max: usize) -> NodeTable {
        let node = Node {
            key,
            opened: None,
            lookups: 1,
            children: 0,
            parent: ROOT_ID,
            name: Box::from(c""),
            fd: Some(root),
            used: true,
            pinned: true,
        };
        NodeTable {
            nodes: HashMap::from([(ROOT_ID, node)]),
            by_key: HashMap::from([(key, ROOT_ID)]),
            next: ROOT_ID + 1,
            ring: VecDeque::new(),
            open: 1,
            pinned: 1,
            open_max,
        }
    }

    /// Descriptors open now.
    #[cfg(test)]
    pub(crate) fn open_count(&self) -> usize {
        self.open
    }

    /// Nodes known now.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The descriptor of a node, if it is open.
    pub(crate) fn fd(&mut self, id: u64) -> Result<Option<Arc<OwnedFd>>, Errno> {
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.used = true;
        Ok(node.fd.clone())
    }

    /// The shortest way to a node, for a call that can name a file by its parent.
    pub(crate) fn reach(&mut self, id: u64) -> Result<Reach, Errno> {
        let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.used = true;
        Ok(match &node.fd {
            Some(fd) => Reach::Open(fd.clone()),
            None => Reach::Named {
                parent: node.parent,
                name: CString::from(&*node.name),
                key: node.key,
            },
        })
    }

    /// How to open a node that has no descriptor.
    pub(crate) fn walk(&self, id: u64) -> Result<Walk, Errno> {
        let mut node = self.nodes.get(&id).ok_or(Errno::STALE)?;
        let key = node.key;
        let mut names = Vec::new();
        let base = loop {
            if let Some(fd) = &node.fd {
                break fd.clone();
            }
            if names.len() >= WALK_MAX_NAMES {
                return Err(Errno::STALE);
            }
            names.push(node.name.to_bytes());
            node = self.nodes.get(&node.parent).ok_or(Errno::STALE)?;
        };
        let mut paths = Vec::new();
        let mut path: Vec<u8> = Vec::new();
        for name in names.into_iter().rev() {
            if !path.is_empty() && path.len() + 1 + name.len() > WALK_PATH_MAX_BYTES {
                paths.push(std::mem::take(&mut path));
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        paths.push(path);
        let paths: Result<Vec<CString>, _> = paths.into_iter().map(CString::new).collect();
        Ok(Walk {
            base,
            paths: paths.map_err(|_| Errno::STALE)?,
            key,
        })
    }

    /// Notes that the guest was told of the file `key`, seen as `name` in `parent`; returns its node.
    pub(crate) fn enter(&mut self, parent: u64, name: &CStr, key: Key) -> Result<u64, Errno> {
        if let Some(&id) = self.by_key.get(&key) {
            let node = self.nodes.get_mut(&id).ok_or(Errno::STALE)?;
            node.lookups = node.lookups.saturating_add(1);
            node.used = true;
            self.moved(id, parent, name);
            return Ok(id);
        }
        if self.nodes.len() >= NODES_MAX {
            return Err(Errno::NFILE);
        }
        self.nodes.get_mut(&parent).ok_or(Errno::STALE)?.children += 1;
        let id = self.next;
        self.next += 1;
        self.by_key.insert(key, id);
        self.nodes.insert(
            id,
            Node {
                key,
                opened: None,
                lookups: 1,
                children: 0,
                parent,
                name: Box::from(name),
                fd: None,
                used: true,
                pinned: false,
            },
        );
        Ok(id)
    }

    /// The node of a file, if the guest knows it.
    pub(crate) fn find(&self, key: &Key) -> Option<u64> {
        self.by_key.get(key).copied()
    }

    /// Whether `name` in `parent` is where the node was last seen.
    pub(crate) fn is_at(&self, id: u64, parent: u64, name: &CStr) -> bool {
        self.nodes
            .get(&id)
            .is_some_and(|node| node.parent == parent && *node.name == *name)
    }

    /// The key of a node.
    pub(crate) fn key(&self, id: u64) -> Result<Key, Errno> {
        self.nodes.get(&id).map(|node| node.key).ok_or(Errno::STALE)
    }

    /// Notes with which content a file is opened, if that is certain; true if it was the same the last time.
    pub(crate) fn opened(&mut self, id: u64, stamp: Option<Stamp>) -> bool {
        match self.nodes.get_mut(&id) {
            Some(node) => std::mem::replace(&mut node.opened, stamp) == stamp && stamp.is_some(),
            None => false,
        }
    }

    /// Notes that a node was seen as `name` in `parent`.
    pub(crate) fn moved(&mut self, id: u64, parent: u64, name: &CStr) {
        if id == ROOT_ID || !self.nodes.contains_key(&parent) {
            return;
        }
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let (old, pinned, kind) = (node.parent, node.pinned, node.key.kind);
        if old == parent && *node.name == *name && !pinned {
            return;
        }
        // Names seen at different times can contradict each other; a directory must never become its own
        // ancestor, or a walk would not end and its nodes never be freed.
        if kind == libc::S_IFDIR && old != parent && self.is_below(parent, id) {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.parent = parent;
            if *node.name != *name {
                node.name = Box::from(name);
            }
            node.pinned = false;
        }
        if pinned {
            self.pinned -= 1;
            if self.nodes.get(&id).is_some_and(|node| node.fd.is_some()) {
                self.ring.push_back(id);
            }
        }
        if old != parent {
            if let Some(node) = self.nodes.get_mut(&parent) {
                node.children += 1;
            }
            self.left(old);
        }
    }

    fn is_below(&self, mut id: u64, ancestor: u64) -> bool {
        for _ in 0..WALK_MAX_NAMES {
            if id == ancestor {
                return true;
            }
            if id == ROOT_ID {
                return false;
            }
            match self.nodes.get(&id) {
                Some(node) => id = node.parent,
                None => return false,
            }
        }
        true
    }

    /// Keeps a descriptor for a node. Returns what must be closed for it, once the lock is gone.
    pub(crate) fn keep(&mut self, id: u64, fd: Arc<OwnedFd>) -> Option<Arc<OwnedFd>> {
        let Some(node) = self.nodes.get_mut(&id) else {
            return Some(fd);
        };
        if node.fd.is_some() {
            return Some(fd);
        }
        node.fd = Some(fd);
        node.used = true;
        self.open += 1;
        if !node.pinned {
            self.ring.push_back(id);
        }
        self.evict()
    }

    /// Keeps the descriptor of a node whose name is about to go. Not when half the budget is taken by such
    /// nodes already: then the guest gets ESTALE for the oldest trick of holding on to deleted files.
    pub(crate) fn pin(&mut self, id: u64) {
        if self.pinned >= self.open_max / 2 {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            if !node.pinned {
                node.pinned = true;
                self.pinned += 1;
            }
        }
    }

    /// Takes back lookups; drops the node and then its parents as far as nobody needs them. Returns the
    /// descriptors to close once the lock is gone.
    pub(crate) fn forget(&mut self, id: u64, lookups: u64, closed: &mut Vec<Arc<OwnedFd>>) {
        if id == ROOT_ID {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(lookups);
        }
        closed.extend(self.sweep(id));
    }

    fn left(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
        }
        drop(self.sweep(parent));
    }

    /// Removes `id` if nobody needs it, then its parent, and so on.
    fn sweep(&mut self, mut id: u64) -> Vec<Arc<OwnedFd>> {
        let mut closed = Vec::new();
        while id != ROOT_ID {
            match self.nodes.get(&id) {
                Some(node) if node.lookups == 0 && node.children == 0 => {}
                _ => break,
            }
            let Some(node) = self.nodes.remove(&id) else {
                break;
            };
            self.by_key.remove(&node.key);
            self.pinned -= usize::from(node.pinned);
            if let Some(fd) = node.fd {
                self.open -= 1;
                closed.push(fd);
            }
            id = node.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
        closed
    }

    /// Closes one descriptor if there are too many; forgotten nodes leave stale entries in the ring, which
    /// are swept out before they outnumber the live ones.
    fn evict(&mut self) -> Option<Arc<OwnedFd>> {
        if self.ring.len() > 2 * self.open_max + 16 {
            let nodes = &self.nodes;
            let mut seen = HashSet::new();
            self.ring.retain(|id| {
                let live = |node: &Node| node.fd.is_some() && !node.pinned;
                nodes.get(id).is_some_and(live) && seen.insert(*id)
            });
        }
        if self.open <= self.open_max {
            return None;
        }
        // Twice round at most: the first pass may only clear `used`.
        for _ in 0..2 * self.ring.len() {
            let id = self.ring.pop_front()?;
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            if node.pinned || node.fd.is_none() {
                continue;
            }
            if node.used {
                node.used = false;
                self.ring.push_back(id);
                continue;
            }
            self.open -= 1;
            return node.fd.take();
        }
        None
    }
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
