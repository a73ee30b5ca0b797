#!/bin/sh
# man.sh prints a page for man(1), made of the texts that users read elsewhere:
#
#   man.sh hamlet HAMLET     hamlet(1): a frame, which stands below, and in it
#                            what HAMLET, the binary, says of each command
#   man.sh handlers HAMLET   hamlet-handlers(7): docs/handlers.md
#
# Version and date are those of the newest entry of CHANGELOG.md, so that the page
# has the same bytes wherever it is made.
set -eu
export LC_ALL=C
top=$(cd "$(dirname -- "$0")/../.." && pwd)
hamlet=$2
release=$(sed -n 's/^## \([0-9][0-9.]*\) - \([0-9-]*\)$/\1 \2/p' "$top/CHANGELOG.md" | head -n 1)

heading() { printf '.TH %s "%s" "hamlet %s" "%s"\n' "$1" "${release#* }" "${release% *}" "$2"; }

# roff is what the awk programs below need: text(s) as it is, marked(s) with `code`
# and **words** of Markdown in bold, and fill(s) in lines of at most 78 bytes.
roff='
function text(s) {
	gsub(/\\/, "\\e", s)
	gsub(/-/, "\\-", s)
	return s
}
function bold(s, open, mark) {
	while (match(s, open)) {
		word = substr(s, RSTART + mark, RLENGTH - 2 * mark)
		s = substr(s, 1, RSTART - 1) "\\fB" word "\\fR" substr(s, RSTART + RLENGTH)
	}
	return s
}
function marked(s) { return bold(bold(text(s), "`[^`]*`", 1), "[*][*][^*]*[*][*]", 2) }
function line(s) { return (s ~ /^[.\047]/ ? "\\&" : "") s "\n" }
function fill(s,   out, at) {
	while (length(s) > 78) {
		for (at = 78; at > 1 && substr(s, at, 1) != " "; at--);
		if (at == 1) break
		out = out line(substr(s, 1, at - 1))
		s = substr(s, at + 1)
	}
	return out line(s)
}'

# command NAME SHORT turns what help says of a command into a section: usage, what
# it does, text, options and examples, in this order, whatever order they come in.
command() {
	"$hamlet" help "$1" | awk -v name="$1" -v short="$2" "$roff"'
	/^Usage: / { usage = substr($0, 8); next }
	/^  -/ {
		option = $1; sub(/^  *[^ ]+ */, "")
		options = options ".TP\n\\fB" text(option) "\\fR" ($0 == "" ? "" : " \\fI" text($0) "\\fR") "\n"
		next
	}
	/^    \t/ { sub(/^    \t/, ""); options = options fill(text($0)); next }
	/^  / { examples = examples line(text(substr($0, 3))); next }
	/^$/ { body = body (body ~ /[^\n]$|[^P]\n$/ ? ".PP\n" : ""); next }
	{ body = body fill(text($0)) }
	END {
		sub(/(\.PP\n)+$/, "", body)
		printf ".SS %s\n", text(name)
		sub(/^hamlet /, "", usage)
		printf ".B hamlet\n%s\n.PP\n%s.\n", text(usage), text(toupper(substr(short, 1, 1)) substr(short, 2))
		if (body != "") printf ".PP\n%s", body
		printf "%s", options
		if (examples != "") printf ".PP\nExamples:\n.PP\n.in 2\n.nf\n%s.fi\n.in\n", examples
	}'
}

page_hamlet() {
	heading 'HAMLET 1' 'General Commands Manual'
	cat <<'END'
.SH NAME
hamlet \- makes machines and containers a cluster
.SH SYNOPSIS
.B hamlet agent
.RI [ OPTION... ]
.br
.B hamlet
.I COMMAND
.RI [ OPTION... ]
.RI [ ARGUMENT... ]
.br
.B hamlet help
.RI [ COMMAND ]
.SH DESCRIPTION
An agent on each machine makes it a member of a cluster.
Agents find each other by the addresses of one or more members
.RB ( \-join ),
notice within moments when a member ends or vanishes, and run scripts on such
events; see
.BR hamlet\-handlers (7).
All other commands ask the agent on their own machine, at 127.0.0.1:7373.
.PP
Agents listen on port 7946, UDP and TCP, and need both between all members.
.SH COMMANDS
Options may stand before or behind arguments, and may be written with one or
two dashes.
Behind \-\- nothing is an option.
END
	"$hamlet" help | sed -n '/^Commands:/,/^$/s/^  //p' | while read -r name short; do command "$name" "$short"; done
	cat <<'END'
.SH ENVIRONMENT
.TP
.BR HAMLET_ *
Each option of the agent:
.B \-log\-level
is
.BR HAMLET_LOG_LEVEL .
Lists are split on commas, or on newlines if there are any.
A flag wins over the environment, and the environment over files.
.TP
.BR SERF_RPC_ADDR ", " SERF_RPC_AUTH
Where the other commands find their agent, and its token.
Where they are not set,
.B HAMLET_RPC_ADDR
and
.BR HAMLET_RPC_AUTH .
.TP
.B JOURNAL_STREAM
Set by systemd: log lines then carry their priority and no date.
.SH FILES
None is needed.
Nothing is kept on disk.
.TP
.IB DIR /*.json
With
.B \-config\-dir
.IR DIR :
options in Serf's JSON form, read in the order of their names.
.B \-config\-file
names a single one.
.SH EXIT STATUS
.TP
.B 0
It is done; an agent has left, or was told to stop.
.TP
.B 1
It failed.
The message says why, and often what to do.
.TP
.B 2
Wrong usage, or an option that can never work.
.SH SIGNALS
.TP
.BR SIGINT " (Ctrl-C)"
The agent leaves the cluster gracefully.
.TP
.B SIGTERM
The agent ends at once, and the others see it fail; with
.B \-leave\-on\-terminate
it leaves.
.TP
.B SIGHUP
The agent reads its files and options again: handlers, tags, the log level and
keys change while it runs.
.PP
A second signal to stop ends the agent at once, with exit status 1.
.SH SEE ALSO
.BR hamlet\-handlers (7)
END
}

page_handlers() {
	heading 'HAMLET-HANDLERS 7' 'Miscellaneous Information Manual'
	printf '.SH NAME\nhamlet\\-handlers \\- scripts that a hamlet agent runs on events\n.SH DESCRIPTION\n'
	awk "$roff"'
	/^# / { next }
	/^## / { printf ".SH %s\n", toupper(text(substr($0, 4))); begun = blank = 0; next }
	/^```/ && code { printf ".fi\n.in\n"; code = 0; next }
	/^```/ { printf "%s.in 4\n.nf\n", begun ? ".PP\n" : ""; code = begun = 1; next }
	code { printf "%s", line(text($0)); next }
	/^$/ { blank = 1; next }
	/^- / { printf ".IP \\(bu 2\n%s", fill(marked(substr($0, 3))); begun = 1; blank = 0; next }
	{
		if (blank && begun) print ".PP"
		sub(/^  /, "")
		printf "%s", fill(marked($0))
		begun = 1
		blank = 0
	}' "$top/docs/handlers.md"
	printf '.SH SEE ALSO\n.BR hamlet (1)\n'
}

case $1 in
hamlet | handlers) "page_$1" ;;
*) echo "usage: $0 hamlet|handlers HAMLET" >&2 && exit 2 ;;
esac
