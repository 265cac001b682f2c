//! `user[:group]` resolved by the container's own `/etc/passwd` and `/etc/group` (`passwd(5)`, `group(5)`), which are
//! a stranger's: opened inside the root file system only, regular files only, at most [`FILE_MAX_BYTES`]
//! (CVE-2026-47262 was a group file of 100 MB).

use crate::image::tree::{Below, Tree};
use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Read};

/// Longest passwd or group file that is read, in bytes.
const FILE_MAX_BYTES: u64 = 1024 * 1024;
/// Most supplementary groups (`NGROUPS_MAX` is 65536; no image needs more than a few).
const GROUPS_MAX: usize = 1024;

/// Who the process runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
    /// The home directory, where the passwd file knows the user.
    pub(crate) home: Option<String>,
}

/// Why a user was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    /// No such user.
    #[error("unknown user {0:?}: it is not in the container's /etc/passwd")]
    UnknownUser(String),
    /// No such group.
    #[error("unknown group {0:?}: it is not in the container's /etc/group")]
    UnknownGroup(String),
    /// A number that is no id.
    #[error("user {0:?}: an id is a number from 0 to 4294967294")]
    Range(String),
    /// Nothing where a name must be.
    #[error("user {0:?}: expected USER or USER:GROUP")]
    Syntax(String),
    /// The file cannot be read.
    #[error("cannot read the container's {path}")]
    Read {
        /// The file.
        path: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The file is too long.
    #[error("the container's {path} is longer than {FILE_MAX_BYTES} bytes")]
    TooLong {
        /// The file.
        path: &'static str,
    },
}

/// The two files, as text with everything that is not UTF-8 replaced.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads both files of a root file system; one that is not there is empty.
    ///
    /// # Errors
    /// A file is too long, not regular, or a loop of links.
    pub(crate) fn read(rootfs: &Tree) -> Result<Accounts, UserError> {
        Ok(Accounts {
            passwd: read(rootfs, "/etc/passwd")?,
            group: read(rootfs, "/etc/group")?,
        })
    }

    /// Resolves `user[:group]`; an empty text is root.
    ///
    /// # Errors
    /// A name that the files do not have, a number that is no id.
    pub(crate) fn resolve(&self, text: &str) -> Result<User, UserError> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if text.contains('\0') || group.is_some_and(|group| group.is_empty() || group.contains(':'))
        {
            return Err(UserError::Syntax(text.to_owned()));
        }
        let user = if user.is_empty() { "0" } else { user };
        let number = id(user)?;
        let account = self
            .passwd
            .lines()
            .filter_map(Account::parse)
            .find(|account| number.map_or(account.name == user, |uid| account.uid == uid));
        let (uid, gid) = match (&account, number) {
            (Some(account), _) => (account.uid, account.gid),
            (None, Some(uid)) => (uid, 0),
            (None, None) => return Err(UserError::UnknownUser(user.to_owned())),
        };
        let home = account.as_ref().map(|account| account.home.to_owned());
        let Some(group) = group else {
            let name = account.map_or("", |account| account.name);
            return Ok(User {
                uid,
                gid,
                additional_gids: self.groups_of(name, gid),
                home,
            });
        };
        Ok(User {
            uid,
            gid: self.group(group)?,
            additional_gids: Vec::new(),
            home,
        })
    }

    fn group(&self, group: &str) -> Result<u32, UserError> {
        if let Some(gid) = id(group)? {
            return Ok(gid);
        }
        let named = |(name, gid, _): (&str, u32, &str)| (name == group).then_some(gid);
        let found = self.group.lines().filter_map(parse_group).find_map(named);
        found.ok_or_else(|| UserError::UnknownGroup(group.to_owned()))
    }

    /// The groups that list the user, without its own.
    fn groups_of(&self, user: &str, own: u32) -> Vec<u32> {
        if user.is_empty() {
            return Vec::new();
        }
        let mut gids: Vec<u32> = self
            .group
            .lines()
            .filter_map(parse_group)
            .filter(|(_, gid, members)| {
                *gid != own && members.split(',').any(|member| member == user)
            })
            .map(|(_, gid, _)| gid)
            .take(GROUPS_MAX)
            .collect();
        gids.sort_unstable();
        gids.dedup();
        gids
    }
}

/// A line of passwd: name, password, uid, gid, comment, home, shell.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Account<'a>> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Account {
            name,
            uid,
            gid,
            home,
        })
    }
}

/// A line of group: name, password, gid, members.
fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or_default()))
}

/// A number as an id; `None` for a name. 4294967295 is -1 to the kernel: "do not change" (CVE-2024-40635 was such a
/// wrap to root).
fn id(text: &str) -> Result<Option<u32>, UserError> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match text.parse() {
        Ok(u32::MAX) | Err(_) => Err(UserError::Range(text.chars().take(40).collect())),
        Ok(id) => Ok(Some(id)),
    }
}

fn read(rootfs: &Tree, path: &'static str) -> Result<String, UserError> {
    let failed = |cause| UserError::Read { path, cause };
    let below = Below::new(path.as_bytes()).map_err(|bad| failed(io::Error::other(bad)))?;
    let file = match rootfs.open(&below, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
        Ok(fd) => File::from(fd),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(failed(error)),
    };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > FILE_MAX_BYTES {
        return Err(UserError::TooLong { path });
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;
    use proptest::prelude::*;
    use std::fs;

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0:root:/root:/bin/sh\nwww:x:33:44:w:/var/www:/bin/false\nbroken\n"
                .into(),
            group: "root:x:0:\nweb:x:44:www\nadm:x:4:www,root\n".into(),
        }
    }

    #[test]
    fn a_name_brings_its_group_its_groups_and_its_home() {
        let user = accounts().resolve("www").expect("known");
        assert_eq!((user.uid, user.gid), (33, 44));
        assert_eq!(user.additional_gids, [4]);
        assert_eq!(user.home.as_deref(), Some("/var/www"));
    }

    #[test]
    fn a_number_that_nobody_has_is_itself_in_group_0() {
        let user = accounts().resolve("1234").expect("a number");
        assert_eq!((user.uid, user.gid, user.home), (1234, 0, None));
    }

    #[test]
    fn an_explicit_group_is_the_only_one() {
        let user = accounts().resolve("www:adm").expect("known");
        assert_eq!((user.uid, user.gid), (33, 4));
        assert!(user.additional_gids.is_empty());
        assert_eq!(accounts().resolve("1:2").expect("numbers").gid, 2);
    }

    #[test]
    fn an_empty_text_is_root() {
        assert_eq!(accounts().resolve("").expect("root").uid, 0);
    }

    #[test]
    fn unknown_names_are_refused_by_name() {
        let error = accounts()
            .resolve("nosuchuser")
            .expect_err("unknown")
            .to_string();
        assert!(error.contains("nosuchuser"), "{error}");
        let error = accounts()
            .resolve("www:nosuch")
            .expect_err("unknown")
            .to_string();
        assert!(error.contains("unknown group \"nosuch\""), "{error}");
    }

    #[test]
    fn the_number_that_means_no_change_is_refused() {
        for text in ["4294967295", "4294967296", "99999999999999999999"] {
            assert!(
                matches!(accounts().resolve(text), Err(UserError::Range(_))),
                "{text}"
            );
        }
        assert!(accounts().resolve("4294967294").is_ok());
    }

    #[test]
    fn a_passwd_that_links_out_is_looked_for_inside() {
        let scratch = Scratch::new("users");
        fs::create_dir(scratch.path().join("etc")).expect("writable");
        std::os::unix::fs::symlink("/etc/elsewhere", scratch.path().join("etc/passwd"))
            .expect("writable");
        fs::write(scratch.path().join("etc/elsewhere"), "me:x:7:8::/me:\n").expect("writable");
        let root = fs::File::open(scratch.path()).expect("there");
        let accounts = Accounts::read(&Tree::new(root.into())).expect("readable");
        assert_eq!(accounts.resolve("me").expect("known").uid, 7);
    }

    #[test]
    fn a_group_file_of_a_hundred_megabytes_is_refused() {
        let scratch = Scratch::new("users");
        fs::create_dir(scratch.path().join("etc")).expect("writable");
        let file = fs::File::create(scratch.path().join("etc/group")).expect("writable");
        file.set_len(100 << 20).expect("sparse");
        let root = fs::File::open(scratch.path()).expect("there");
        let error = Accounts::read(&Tree::new(root.into())).expect_err("too long");
        assert!(error.to_string().contains("/etc/group"), "{error}");
    }

    proptest! {
        #[test]
        fn any_files_and_any_text_are_resolved_or_refused(passwd: String, group: String, text: String) {
            let accounts = Accounts { passwd, group };
            if let Ok(user) = accounts.resolve(&text) {
                prop_assert!(user.uid != u32::MAX || accounts.passwd.contains("4294967295"));
            }
        }
    }
}
