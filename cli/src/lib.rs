//! The person's door to Capsid: run, check.
