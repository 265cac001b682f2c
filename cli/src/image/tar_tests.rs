//! Tests of the tar reader, with archives made by hand, and the maker that other tests use.

use super::*;
use proptest::prelude::*;

/// Builds archives block by block, without the checks that a decent writer would make.
#[derive(Default)]
pub(crate) struct TarMaker(Vec<u8>);

impl TarMaker {
    pub(crate) fn add(
        &mut self,
        kind: u8,
        path: &str,
        link: &str,
        mode: u32,
        data: &[u8],
    ) -> &mut Self {
        let mut block = [0u8; BLOCK_BYTES];
        let mut put = |offset: usize, bytes: &[u8]| {
            block[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, path.as_bytes());
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", data.len()).as_bytes());
        put(136, b"00000000001\0");
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(block);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK_BYTES), 0);
        self
    }

    pub(crate) fn file(&mut self, path: &str, data: &[u8]) -> &mut Self {
        self.add(b'0', path, "", 0o644, data)
    }

    pub(crate) fn pax(&mut self, records: &[(&str, &str)]) -> &mut Self {
        let mut text = String::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length = body + length.to_string().len();
            }
            text.push_str(&format!("{length} {key}={value}\n"));
        }
        self.add(b'x', "pax", "", 0o644, text.as_bytes())
    }

    pub(crate) fn done(&self) -> Vec<u8> {
        let mut archive = self.0.clone();
        archive.extend([0; 2 * BLOCK_BYTES]);
        archive
    }
}

fn entries(archive: &[u8]) -> Result<Vec<Entry>, TarError> {
    let mut reader = TarReader::new(archive);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        entries.push(entry);
    }
    Ok(entries)
}

#[test]
fn a_file_comes_with_its_bytes() {
    let archive = TarMaker::default().file("etc/hosts", b"hello").done();
    let mut reader = TarReader::new(archive.as_slice());
    let entry = reader.next_entry().expect("valid").expect("one entry");
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("its bytes");
    assert_eq!(
        (entry.path.as_slice(), text.as_str()),
        (&b"etc/hosts"[..], "hello")
    );
    assert_eq!((entry.mode, entry.mtime, entry.size), (0o644, (1, 0), 5));
    assert_eq!(&archive[entry.data_offset as usize..][..5], b"hello");
    assert!(reader.next_entry().expect("valid").is_none());
}

#[test]
fn pax_records_override_the_header() {
    let archive = TarMaker::default()
        .pax(&[
            ("path", "a/long/name"),
            ("uid", "70000"),
            ("mtime", "1700000000.25"),
            ("SCHILY.xattr.user.colour", "blue"),
        ])
        .file("short", b"x")
        .done();
    let entry = entries(&archive).expect("valid").remove(0);
    assert_eq!(entry.path, b"a/long/name");
    assert_eq!(
        (entry.uid, entry.mtime),
        (70000, (1_700_000_000, 250_000_000))
    );
    assert_eq!(entry.xattrs, [(b"user.colour".to_vec(), b"blue".to_vec())]);
}

#[test]
fn gnu_long_names_override_the_header() {
    let long = "d/".repeat(200) + "f";
    let archive = TarMaker::default()
        .add(b'L', "././@LongLink", "", 0, format!("{long}\0").as_bytes())
        .file("short", b"")
        .done();
    assert_eq!(entries(&archive).expect("valid")[0].path, long.as_bytes());
}

#[test]
fn a_pax_time_before_1970_counts_forward() {
    assert_eq!(pax_time(b"-1.25"), Some((-2, 750_000_000)));
    assert_eq!(pax_time(b"-1"), Some((-1, 0)));
    assert_eq!(pax_time(b"1.x"), None);
}

#[test]
fn a_base_256_size_is_read() {
    assert_eq!(number(&[0x80, 0, 0, 0, 1, 0]), Some(256));
    assert_eq!(number(&[0xff; 12]), None);
}

#[test]
fn an_archive_cut_in_its_data_is_truncated() {
    let archive = TarMaker::default().file("f", &[7; 4096]).done();
    let error = entries(&archive[..2048]).expect_err("cut");
    assert!(matches!(error, TarError::Truncated(2048)), "{error}");
}

#[test]
fn an_archive_cut_in_a_header_is_truncated() {
    let archive = TarMaker::default().file("f", b"").done();
    assert!(matches!(
        entries(&archive[..100]),
        Err(TarError::Truncated(100))
    ));
}

#[test]
fn a_text_is_not_a_tar() {
    let text = [b"no archive at all".as_slice(), &[b' '; 600]].concat();
    assert!(matches!(entries(&text), Err(TarError::Checksum(0))));
}

#[test]
fn a_long_name_of_a_gigabyte_is_refused_unread() {
    let mut archive = TarMaker::default().add(b'L', "x", "", 0, b"").done();
    archive[124..136].copy_from_slice(b"10000000000\0");
    let sum: u32 = archive[..512]
        .iter()
        .enumerate()
        .map(|(i, b)| {
            if (148..156).contains(&i) {
                32
            } else {
                u32::from(*b)
            }
        })
        .sum();
    archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    assert!(matches!(entries(&archive), Err(TarError::TooLong { .. })));
}

#[test]
fn a_sparse_file_is_refused() {
    let archive = TarMaker::default().add(b'S', "x", "", 0, b"").done();
    assert!(matches!(entries(&archive), Err(TarError::Sparse(0))));
}

#[test]
fn a_size_on_a_directory_means_nothing() {
    let archive = TarMaker::default()
        .add(b'5', "d/", "", 0o755, b"")
        .file("f", b"x")
        .done();
    let entries = entries(&archive).expect("valid");
    assert_eq!(entries[0].kind, Kind::Directory);
    assert_eq!(entries[1].size, 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        let _either = entries(&bytes);
    }

    #[test]
    fn a_damaged_archive_is_read_or_refused(at in 0usize..2048, byte: u8) {
        let mut archive = TarMaker::default()
            .pax(&[("path", "x"), ("SCHILY.xattr.user.a", "b")])
            .file("f", b"data")
            .done();
        if let Some(damaged) = archive.get_mut(at) {
            *damaged = byte;
        }
        let _either = entries(&archive);
    }

    #[test]
    fn any_pax_text_is_read_or_refused(text: Vec<u8>) {
        let _either = Extended::default().pax(&text, 0);
    }
}
