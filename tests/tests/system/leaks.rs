//! After a run the host is as it was.

use capsid_tests::capsid::sh;
use capsid_tests::ledger::Ledger;

#[test]
fn ten_containers_one_after_another_leave_nothing() {
    sh(&[], "true").wait().exits(0); // fills the image cache, which is meant to stay
    let before = Ledger::now();
    for _ in 0..10 {
        sh(&[], "true").wait().exits(0);
    }
    before.balances();
}
