use super::*;
use crate::fs::abi::Put;
use proptest::prelude::*;

fn header(opcode: u32, len: usize) -> Header {
    Header {
        opcode,
        unique: 1,
        node: 1,
        uid: 0,
        gid: 0,
        len: len as u32,
        extensions: 0,
    }
}

#[test]
fn a_header_cut_short_is_none() {
    assert!(Header::parse(&[0; 39]).is_none());
    let parsed = Header::parse(&[1; 40]).expect("a header");
    assert_eq!(parsed.unique, 0x0101_0101_0101_0101);
}

#[test]
fn extensions_that_were_not_agreed_on_are_refused() {
    let mut bytes = [0; 40];
    bytes[0] = 40;
    assert_eq!(Header::parse(&bytes).unwrap().check(40), Ok(()));
    assert_eq!(Header::parse(&bytes).unwrap().check(41), Err(Errno::INVAL));
    bytes[36] = 1;
    assert_eq!(Header::parse(&bytes).unwrap().check(40), Err(Errno::INVAL));
}

#[test]
fn times_that_hide_utime_now_or_omit_are_refused() {
    for nanos in [
        1_000_000_000,
        libc::UTIME_NOW as u32,
        libc::UTIME_OMIT as u32,
        u32::MAX,
    ] {
        let mut args = Vec::new();
        args.put_u32(fattr::ATIME);
        args.put_zeros(52);
        args.put_u32(nanos);
        args.put_zeros(28);
        assert_eq!(args.len(), 88);
        let parsed = parse(&header(opcode::SETATTR, 128), &args, 0);
        assert_eq!(parsed, Err(Errno::INVAL), "{nanos}");
    }
}

#[test]
fn times_before_1970_are_kept() {
    let mut args = Vec::new();
    args.put_u32(fattr::MTIME);
    args.put_zeros(36 - 4 - 4);
    args.put_u64(0);
    args.truncate(32);
    args.put_u64((-5i64) as u64); // atime is at 32, mtime at 40
    args.truncate(32);
    args.put_u64(0);
    args.put_u64((-5i64) as u64);
    args.put_zeros(88 - 48);
    let parsed = parse(&header(opcode::SETATTR, 128), &args, 0);
    let Ok(Op::Setattr(changes)) = parsed else {
        panic!("{parsed:?}");
    };
    assert_eq!(
        changes.mtime,
        Time::At {
            seconds: -5,
            nanos: 0
        }
    );
    assert_eq!(changes.atime, Time::Keep);
}

#[test]
fn a_batch_of_forgets_is_as_long_as_it_is_and_not_as_it_says() {
    for (count, entries, fits) in [
        (2u32, 2, true),
        (3, 2, false),
        (u32::MAX, 2, false),
        (0, 0, true),
    ] {
        let mut args = Vec::new();
        args.put_u32(count);
        args.put_u32(0);
        for number in 0..entries {
            args.put_u64(number);
            args.put_u64(1);
        }
        let parsed = parse(&header(opcode::BATCH_FORGET, 0), &args, 0);
        assert_eq!(parsed.is_ok(), fits, "{count} {entries}");
    }
}

#[test]
fn bytes_behind_the_arguments_are_refused() {
    assert_eq!(parse(&header(opcode::STATFS, 0), &[], 0), Ok(Op::Statfs));
    assert_eq!(
        parse(&header(opcode::STATFS, 0), &[0], 0),
        Err(Errno::INVAL)
    );
    let lookup = parse(&header(opcode::LOOKUP, 0), b"name\0", 0);
    assert_eq!(
        lookup,
        Ok(Op::Lookup {
            name: Name::parse(c"name").unwrap()
        })
    );
    assert_eq!(
        parse(&header(opcode::LOOKUP, 0), b"name\0x", 0),
        Err(Errno::INVAL)
    );
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(code in 0..64u32, args: Vec<u8>, data: usize) {
        let _either = parse(&header(code, 0), &args, data);
    }

    #[test]
    fn what_is_parsed_is_within_its_bounds(
        code in prop::sample::select(vec![opcode::READ, opcode::WRITE, opcode::LOOKUP, opcode::FALLOCATE]),
        fields in prop::collection::vec(prop_oneof![0..9u64, any::<u64>()], 4..8),
        data in 0..10usize,
    ) {
        let args: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        match parse(&header(code, 0), &args, data) {
            Ok(Op::Read { span, .. } | Op::Write { span, .. }) => {
                prop_assert!(span.len <= u64::from(DATA_MAX_BYTES));
                prop_assert!(span.offset + span.len <= i64::MAX as u64);
            }
            Ok(Op::Fallocate { span, .. }) => prop_assert!(span.offset + span.len <= i64::MAX as u64),
            Ok(Op::Lookup { name }) => {
                let bytes = name.as_c_str().to_bytes();
                prop_assert!((1..=255).contains(&bytes.len()) && !bytes.contains(&b'/'));
            }
            _ => {}
        }
    }
}
