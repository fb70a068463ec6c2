//! How errors are printed.

use std::{error::Error, fmt, iter};

/// An error with all its causes on one line: `what we did: why: why`. A cause that only repeats the last is left out.
pub struct Chain<'a>(pub &'a dyn Error);

/// The causes of an error, nearest first.
pub fn causes(error: &dyn Error) -> impl Iterator<Item = &(dyn Error + 'static)> {
    iter::successors(error.source(), |&cause| cause.source())
}

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        for cause in causes(self.0) {
            let text = text(cause);
            if text != last {
                write!(f, ": {text}")?;
                last = text;
            }
        }
        Ok(())
    }
}

/// A status prints its own causes in Debug form; they follow in the chain.
fn text(cause: &(dyn Error + 'static)) -> String {
    match cause.downcast_ref::<tonic::Status>() {
        Some(status) if status.message().is_empty() => format!("{:?}", status.code()),
        Some(status) => format!("{:?}: {}", status.code(), status.message()),
        None => cause.to_string(),
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
        let error = Step("the stream ended", Some(Box::new(status)));
        let expected = "the stream ended: Unavailable: no answer: connect: refused";
        assert_eq!(Chain(&error).to_string(), expected);
    }
}
