//! What people see: colours only where a terminal shows them and nobody asked for none, tables that line up.

use std::io::{IsTerminal, stderr, stdout};

/// How to mark words on one output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Screen {
    colours: bool,
}

/// Standard output.
pub(crate) fn output() -> Screen {
    Screen {
        colours: stdout().is_terminal() && wanted(),
    }
}

/// Standard error.
pub(crate) fn errors() -> Screen {
    Screen {
        colours: stderr().is_terminal() && wanted(),
    }
}

/// Without colours, whatever the terminal.
#[cfg(test)]
pub(crate) fn plain() -> Screen {
    Screen { colours: false }
}

fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

impl Screen {
    /// Whether there are colours at all: then lines may be rewritten too.
    pub(crate) fn is_live(self) -> bool {
        self.colours
    }

    /// As it should be.
    pub(crate) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    /// Not as it should be.
    pub(crate) fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    /// On its way.
    pub(crate) fn waiting(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// A heading.
    pub(crate) fn heading(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// Beside the point.
    pub(crate) fn quiet(self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Rows as aligned columns, the first row being the heading. Widths ignore colour codes.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| visible(cell))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let padding = width - visible(cell) + 2;
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn visible(text: &str) -> usize {
    let mut inside = false;
    let counted = text.chars().filter(|letter| {
        let before = inside;
        inside = match (inside, letter) {
            (false, '\x1b') => true,
            (true, 'm') => false,
            (inside, _) => inside,
        };
        !before && !inside
    });
    counted.count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_is_coloured() {
        let colour = Screen { colours: true };
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let plain = table(&[row(["NAME", "READY"]), row(["a", "yes"])]);
        assert_eq!(plain, "NAME  READY\na     yes\n");
        let painted = table(&[
            row(["NAME", "READY"]),
            vec![colour.good("a"), "yes".to_owned()],
        ]);
        assert_eq!(painted, "NAME  READY\n\x1b[32ma\x1b[0m     yes\n");
    }
}
