//! How errors are printed.

use std::{error::Error, fmt, iter};

/// An error with all its causes on one line: `what we did: why: why`. A cause that has been told already is left out.
pub struct Chain<'a>(pub &'a dyn Error);

/// The causes of an error, nearest first.
pub fn causes(error: &dyn Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    iter::successors(error.source(), |&cause| cause.source())
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.to_string();
        add_causes(&mut line, self.0);
        f.write_str(&line)
    }
}

/// Adds what is behind the error and the line does not tell yet.
pub(crate) fn add_causes(line: &mut String, error: &dyn Error) {
    for cause in causes(error) {
        let text = text(cause);
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
    }
}

/// A status prints its own causes in Debug form; they follow in the chain.
fn text(cause: &(dyn Error + 'static)) -> String {
    // A box is an error of its own kind, and what is in it is not among the causes.
    let boxed = cause.downcast_ref::<Box<tonic::Status>>();
    match cause.downcast_ref().or(boxed.map(AsRef::as_ref)) {
        Some(status) => told(status),
        None => cause.to_string(),
    }
}

fn told(status: &tonic::Status) -> String {
    match status.message() {
        "" => format!("{:?}", status.code()),
        message => format!("{:?}: {message}", status.code()),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use tonic::Status;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Step(&'static str, #[source] Option<Box<dyn Error + Send + Sync>>);

    #[test]
    fn a_chain_is_one_line_and_says_nothing_twice() {
        let last = Step("connect", Some(Box::new(io::Error::other("refused"))));
        let error = Step(
            "dial",
            Some(Box::new(Step("connect", Some(Box::new(last))))),
        );
        assert_eq!(Chain(&error).to_string(), "dial: connect: refused");
    }

    #[test]
    fn a_status_tells_its_causes_as_any_error_does() {
        let refused = Box::new(io::Error::other("refused"));
        let mut status = Status::unavailable("no answer");
        status.set_source(std::sync::Arc::new(Step("connect", Some(refused))));
        let error = Step("the stream ended", Some(Box::new(status.clone())));
        let expected = "the stream ended: Unavailable: no answer: connect: refused";
        assert_eq!(Chain(&error).to_string(), expected);
        let error = Boxed(Box::new(status));
        assert_eq!(Chain(&error).to_string(), expected);
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the stream ended")]
    struct Boxed(#[source] Box<Status>);

    #[test]
    fn a_cause_that_a_status_tells_already_is_left_out() {
        let refused = Box::new(io::Error::other("refused"));
        let connect = Box::new(Step("connect", Some(refused)));
        let mut status = Status::unavailable("connect");
        status.set_source(std::sync::Arc::new(Step("transport error", Some(connect))));
        let expected = "the stream ended: Unavailable: connect: transport error: refused";
        assert_eq!(Chain(&Boxed(Box::new(status))).to_string(), expected);
    }
}
