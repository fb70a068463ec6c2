//! What each command does.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    args::{Args, Command, Local},
    demo,
    local::{client, up},
    operator, tool,
};

/// Runs a command; its exit code.
pub(crate) fn run(args: Args) -> Result<ExitCode> {
    match args.command {
        Command::Operator(command) => operator::run(*command, &args.access),
        Command::Tool(tool) => tool::run(tool),
        Command::Local(command) => local(command),
    }
}

fn local(command: Local) -> Result<ExitCode> {
    match command {
        Local::Up(options) => up::run(&options),
        Local::Demo { keep } => demo::run(keep),
        Local::Down { mesh } => client::down(&mesh.name),
        Local::Status { mesh, output } => {
            client::status(&client::Client::named(&mesh.name)?, output)
        }
        Local::Label {
            mesh,
            write,
            target,
            labels,
        } => client::label(&client::Client::named(&mesh.name)?, &target, &labels, write),
        Local::Exec {
            mesh,
            target,
            container,
            command,
            ..
        } => client::exec(
            &client::Client::named(&mesh.name)?,
            target,
            container,
            command,
        ),
        Local::Forward {
            mesh,
            target,
            ports,
            from,
        } => client::forward(&client::Client::named(&mesh.name)?, &target, &ports, from),
        Local::Logs {
            mesh,
            target,
            container,
            follow,
            tail,
        } => client::logs(
            &client::Client::named(&mesh.name)?,
            &target,
            container.as_deref(),
            follow,
            tail,
        ),
        Local::Kill { mesh, part, hold } => {
            client::kill(&client::Client::named(&mesh.name)?, &part, hold)
        }
        Local::Restart { mesh, part } => {
            client::restart(&client::Client::named(&mesh.name)?, &part)
        }
        Local::Explain { mesh, asked } => {
            client::explain(&client::Client::named(&mesh.name)?, &asked)
        }
        Local::Admin {
            mesh,
            part,
            path,
            post,
        } => client::admin(&client::Client::named(&mesh.name)?, &part, &path, post),
    }
}
