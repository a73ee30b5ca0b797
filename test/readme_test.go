package test

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// pages are all pages that a user reads, by their paths.
func pages(t *testing.T) map[string]string {
	t.Helper()
	paths, _ := filepath.Glob("docs/*.md")
	if len(paths) < 6 {
		t.Fatalf("there are only the pages %q", paths)
	}
	texts := make(map[string]string)
	for _, path := range append(paths, "README.md", "CHANGELOG.md") {
		texts[path] = readFile(path)
	}
	return texts
}

// prose is a page without its code blocks.
func prose(text string) string {
	return regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(text, "")
}

// sources are all Go files, those of the tests among them.
func sources() string {
	var all strings.Builder
	for _, pattern := range []string{"*.go", "test/*.go"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			all.WriteString(readFile(f))
		}
	}
	return all.String()
}

// --- what the pages show

// pageSession takes a page's sh blocks, which are commands, and its console blocks,
// where commands follow a $ and the rest is what they show.
func pageSession(text string) (commands, shown []string) {
	text = strings.ReplaceAll(text, " \\\n", " ") // a command on two lines
	for _, m := range regexp.MustCompile("(?s)\n```(sh|console)\n(.*?)```").FindAllStringSubmatch(text, -1) {
		for line := range strings.Lines(m[2]) {
			line = strings.TrimRight(line, "\n")
			if command, ok := strings.CutPrefix(line, "$ "); m[1] == "sh" || ok {
				commands = append(commands, command)
			} else if line != "..." {
				shown = append(shown, line)
			}
		}
	}
	return commands, shown
}

// pageScript makes one script of a page's commands, which waits at its end until its
// input ends. Agents and watches, which a reader starts in terminals of their own,
// run in the background, and the next command waits until they are ready, as a
// reader would. make targets are only looked up.
func pageScript(commands []string) string {
	script := "set -e\n: >agents.log\npids=\ntrap 'kill $pids || :' EXIT\n" +
		"until_shown() { for i in $(seq 100); do [ $(grep -c \"$1\" agents.log) -lt $2 ] || return 0; sleep 0.1; done; return 1; }\n"
	here := false
	agents, hangups := 0, 0
	for _, line := range commands {
		before, after, ready := "", "", ""
		switch {
		case strings.Contains(line, "<<'END'"):
			here = true
		case here:
			here = line != "END"
		case strings.HasPrefix(line, "make "):
			line = "make -C \"$SOURCE\" -n " + strings.TrimPrefix(line, "make ") + " >/dev/null"
		case strings.HasPrefix(line, "hamlet watch"):
			before = fmt.Sprintf("hamlet members -wait %d -timeout 10s >/dev/null\n", agents)
			ready = fmt.Sprintf("until_shown '^[^[]* member: ' %d\n", agents)
		case strings.HasPrefix(line, "hamlet agent"):
			agents++
			ready = fmt.Sprintf("until_shown 'agent running!' %d\n", agents)
		case strings.HasPrefix(line, "reload ") || strings.HasPrefix(line, "kill -HUP"):
			hangups++
			after = fmt.Sprintf("until_shown 'hangup: read the options again' %d\n", hangups)
		}
		if ready != "" {
			line = strings.TrimSuffix(line, " &") + " >>agents.log 2>&1 &\npids=\"$pids $!\""
		}
		script += before + line + "\n" + ready + after
	}
	return script + "echo the end\nread -r _ || :\n"
}

// varies is what differs from run to run: times of day, durations, loads, and versions.
var varies = regexp.MustCompile(`(?m)for \S+ +version \S+ +protocol \d+|\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d|after [0-9.]+(m?s|µs)| *\d\d:\d\d:\d\d up .*$| +$`)

func TestPagesShowWhatTheirCommandsDo(t *testing.T) {
	ran := 0
	for path, text := range pages(t) {
		commands, shown := pageSession(text)
		if len(commands) == 0 {
			continue
		}
		ran += len(shown)
		t.Run(path, func(t *testing.T) { runSession(t, pageScript(commands), shown) })
	}
	if ran < 30 {
		t.Errorf("the pages show only %d lines", ran)
	}
}

// runSession runs the script of a page in a network of its own, if there can be one,
// and looks for the lines that the page shows.
func runSession(t *testing.T, script string, shown []string) {
	dir := t.TempDir()
	source, _ := os.Getwd()
	cmd := exec.Command("unshare", "-n", "sh", "-c", "ip link set lo up\n"+script)
	if err := exec.Command("unshare", "-n", "ip", "link", "set", "lo", "up").Run(); err != nil {
		// The default ports must be free.
		l, err := net.Listen("tcp", "127.0.0.1:7373")
		if err != nil {
			t.Skipf("SKIPPED: %v, and no network namespace can be made", err)
		}
		l.Close()
		cmd = exec.Command("sh", "-c", script)
	}
	cmd.Dir = dir
	cmd.Env = exampleEnv(t, dir, "SOURCE="+source, "HOME="+dir)
	said := &output{}
	cmd.Stdout, cmd.Stderr = said, said
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()

	missing := shown
	show := func() string { return said.String() + readFile(filepath.Join(dir, "agents.log")) }
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline) && len(ended) == 0; time.Sleep(pause) {
		got := strings.Split(varies.ReplaceAllString(show(), ""), "\n")
		missing = slices.DeleteFunc(slices.Clone(shown), func(line string) bool {
			return slices.Contains(got, varies.ReplaceAllString(line, ""))
		})
		if len(missing) == 0 && slices.Contains(got, "the end") {
			break
		}
	}
	stdin.Close()
	if err := <-ended; err != nil {
		t.Errorf("%v", err)
	}
	for _, line := range missing {
		t.Errorf("no command shows %q", line)
	}
	if t.Failed() {
		t.Logf("the script:\n%s\nwhat it showed:\n%s", script, show())
	}
}

// The recorded demo: ports, process ids and times differ from run to run.
func TestReadmeDemoIsWhatMakeDemoShows(t *testing.T) {
	m := regexp.MustCompile("(?s)```text\n\\$ make demo\n(.*?)```").FindStringSubmatch(readFile("README.md"))
	if m == nil {
		t.Fatal("the README has no recorded demo")
	}
	var out bytes.Buffer
	cmd := exec.Command("sh", "examples/demo.sh")
	cmd.Env = hamletCmd().Env
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v:\n%s", err, &out)
	}
	differs := regexp.MustCompile(`/\S*/|(127\.0\.0\.1):\d+|(kill -9) \d+|\d{4}/\d\d/\d\d \d\d:\d\d:\d\d`)
	got := strings.Split(differs.ReplaceAllString(out.String(), "$1$2"), "\n")
	for line := range strings.Lines(m[1]) {
		if line = differs.ReplaceAllString(strings.TrimSuffix(line, "\n"), "$1$2"); !slices.Contains(got, line) {
			t.Errorf("make demo does not show %q:\n%s", line, &out)
		}
	}
}

// --- what the pages say

func TestReadmeIsShortAndInOrder(t *testing.T) {
	text := readFile("README.md")
	if words := len(strings.Fields(text)); words > 1500 {
		t.Errorf("the README has %d words, 1,500 at most: what is more belongs into docs", words)
	}
	at := -1
	for _, part := range []string{"# hamlet\n", "$ make demo\n", "## Why\n", "## Install\n", "## Five minutes\n",
		"## Hosts and containers\n", "## Handlers\n", "## Commands\n", "## Coming from Serf\n", "## More\n"} {
		next := strings.Index(text, part)
		if next <= at {
			t.Errorf("%q is missing or out of order", part)
		}
		at = max(at, next)
	}
}

func TestPagesReadAsPlainEnglish(t *testing.T) {
	odd := regexp.MustCompile(`(?m)(^|[.:!?] |\n- )(Who|Whoever)\b[^?\n]*|\bwould else\b|\bwhoever\b|\bwho is\b`)
	for path, text := range pages(t) {
		for _, m := range odd.FindAllString(prose(text), -1) {
			t.Errorf("%s: %q", path, m)
		}
		for line := range strings.Lines(prose(text)) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 120 && !strings.HasPrefix(line, "|") {
				t.Errorf("%s: a line of %d characters: %.60s...", path, n, line)
			}
		}
	}
}

func TestPagesNameWhatExists(t *testing.T) {
	code, makefile := sources(), readFile("Makefile")
	for path, text := range pages(t) {
		for _, m := range regexp.MustCompile("(?:`|\n|\\$ )make ([a-z-]+)").FindAllStringSubmatch(text, -1) {
			if !strings.Contains(makefile, "\n"+m[1]+":") {
				t.Errorf("%s speaks of make %s, which does not exist", path, m[1])
			}
		}
		for _, m := range regexp.MustCompile("`((?:examples|test|docs|testdata)(?:/[A-Za-z0-9_.-]+)*)/?`").FindAllStringSubmatch(text, -1) {
			if _, err := os.Stat(m[1]); err != nil {
				t.Errorf("%s speaks of %v", path, err)
			}
		}
		for _, name := range regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(text, -1) {
			if !regexp.MustCompile(`\nfunc ` + name + `\w*\(`).MatchString(code) {
				t.Errorf("%s names %s, which does not exist", path, name)
			}
		}
	}
	if names := regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w+`).FindAllString(readFile("docs/security.md"), -1); len(names) < 20 {
		t.Errorf("docs/security.md names only %d tests: its promises are without proof", len(names))
	}
	table := readFile("README.md")
	for _, name := range commandNames(t) {
		if !strings.Contains(table, "| `"+name) && name != "version" {
			t.Errorf("the table of commands lacks %s", name)
		}
	}
}

// Links to files, and to headings as GitHub names them.
func TestPagesLinkToWhatExists(t *testing.T) {
	all := pages(t)
	links := 0
	for path, text := range all {
		for _, m := range regexp.MustCompile(`\]\(([^)\s]+)\)`).FindAllStringSubmatch(prose(text), -1) {
			target, heading, hasHeading := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			links++
			file := path
			if target != "" {
				file = filepath.Join(filepath.Dir(path), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			} else if hasHeading && !slices.Contains(headings(readFile(file)), heading) {
				t.Errorf("%s links to %s, and there is no such heading", path, m[1])
			}
		}
	}
	if links < 15 {
		t.Errorf("the pages have only %d links", links)
	}
}

func headings(text string) (names []string) {
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(prose(text), -1) {
		name := regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(m[1]), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

// What the program says in trouble, as the page about operations quotes it.
func TestPagesQuoteMessagesThatExist(t *testing.T) {
	files, _ := filepath.Glob("*.go")
	code := ""
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			code += regexp.MustCompile(`" ?\+\s*"`).ReplaceAllString(readFile(f), "")
		}
	}
	_, table, _ := strings.Cut(readFile("docs/operations.md"), "\n## Trouble\n")
	table, _, _ = strings.Cut(table, "\n## ")
	quoted := 0
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]*) \|`).FindAllStringSubmatch(table, -1) {
		for _, m := range regexp.MustCompile("`([^`]*)`").FindAllStringSubmatch(row[1], -1) {
			quoted++
			if !strings.Contains(code, m[1]) {
				t.Errorf("no message says %q", m[1])
			}
		}
	}
	if quoted < 15 {
		t.Errorf("only %d messages are quoted", quoted)
	}
}

// The contract's page names what scripts find, and no more.
func TestHandlersPageNamesEveryVariableAndEvent(t *testing.T) {
	t.Parallel()
	page := readFile("docs/handlers.md")
	a := startAgent(t, "-node", "a", "-tag", "name=x", "-log-level", "debug", "-event-handler", "user,query=env | grep ^SERF_")
	a.run("event", "deploy")
	if out, stderr, code := a.run("query", "load"); code != 0 {
		t.Fatalf("%s%s", out, stderr)
	}
	a.waitLog("Event 'user' script output:")
	a.waitLog("Event 'query' script output:")
	variable := regexp.MustCompile(`\bSERF_[A-Z_]+`)
	set := make(map[string]bool)
	eventually(t, "the log holds both environments", func() bool {
		for _, name := range variable.FindAllString(a.stderr.String(), -1) {
			set[name] = true
		}
		return set["SERF_USER_EVENT"] && set["SERF_QUERY_NAME"]
	})
	named := make(map[string]bool)
	for _, name := range variable.FindAllString(page, -1) {
		named[name] = true
		if !set[name] {
			t.Errorf("the page names %s, which no script has", name)
		}
	}
	for name := range set {
		if !named[name] {
			t.Errorf("the page does not name %s", name)
		}
	}

	_, refusal, _ := hamlet(t, "agent", "-event-handler", "bogus=x")
	kinds := regexp.MustCompile(`member-[a-z]+`).FindAllString(refusal, -1)
	for _, kind := range append(kinds, "user:NAME", "query:NAME", "*") {
		if !strings.Contains(page, "`"+kind+"`") {
			t.Errorf("the page does not name the event %s", kind)
		}
	}
	if len(kinds) < 5 {
		t.Errorf("the agent names the events %q", kinds)
	}
	for line := range strings.Lines(page) {
		if len(line) > 81 {
			t.Errorf("help shows this page, and a terminal may have 80 columns: %q", line)
		}
	}
}

// The rows that make bench can be asked for.
func TestFiguresPageNamesTheRowsOfTheBench(t *testing.T) {
	page := readFile("docs/figures.md")
	_, parts, _ := strings.Cut(readFile("test/bench_test.go"), "\nvar benchParts") // which is not built everywhere
	parts, _, _ = strings.Cut(parts, "\n}\n")
	rows := 0
	for _, m := range regexp.MustCompile(`\{"[a-z]+", "([a-z -]+)", `).FindAllStringSubmatch(parts, -1) {
		for _, row := range strings.Fields(m[1]) {
			rows++
			if !strings.Contains(page, "`"+row+"`") {
				t.Errorf("the page does not name the row %s", row)
			}
		}
	}
	if rows < 10 {
		t.Errorf("the bench has %d rows", rows)
	}
}

// The limits that a user meets first: what refuses more says the same number.
func TestPagesSayWhichLimitsHold(t *testing.T) {
	t.Parallel()
	_, table, _ := strings.Cut(readFile("docs/operations.md"), "\n## Limits\n")
	a := startAgent(t, "-node", "a")
	long := strings.Repeat("x", 3000)
	for row, args := range map[string][]string{
		"a name":                     {"agent", "-node", long},
		"the tags of a node":         {"agent", "-tag", "k=" + long},
		"a user event or a query":    {"event", "-rpc-addr", a.rpc, "deploy", long},
		"a user event or a query, n": {"query", "-rpc-addr", a.rpc, "load", long},
	} {
		_, stderr, code := hamlet(t, args...)
		refused := regexp.MustCompile(`the limit is (\d+)`).FindStringSubmatch(stderr)
		said := regexp.MustCompile(`(?m)^\| ` + row + `[^|]*\| ([0-9,]+) bytes`).FindStringSubmatch(table)
		if code == 0 || refused == nil || said == nil {
			t.Errorf("%s: exit %d, %q; the page says %q", row, code, stderr, said)
		} else if number := strings.ReplaceAll(said[1], ",", ""); number != refused[1] {
			t.Errorf("%s: the limit is %s, the page says %s", row, refused[1], number)
		}
	}
}

// --- the map of the code

// The walks through the code that the page about the protocol makes, and the map before them.
func TestProtocolPageWalksThroughFunctionsThatExist(t *testing.T) {
	_, section, _ := strings.Cut(readFile("docs/protocol.md"), "\n## The code\n")
	section, _, _ = strings.Cut(section, "\n## ")
	_, walk, _ := strings.Cut(section, "A datagram with a claim")
	names := regexp.MustCompile("`([a-zA-Z]+)`").FindAllStringSubmatch(walk, -1)
	files, _ := filepath.Glob("*.go")
	code := ""
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		code += readFile(f)
		if !strings.Contains(section, "\n| `"+f+"` |") {
			t.Errorf("%s is not on the map", f)
		}
	}
	for _, m := range names {
		if !regexp.MustCompile(`(?m)^func (\([a-z]+ \*?\w+\) )?` + m[1] + `\(`).MatchString(code) {
			t.Errorf("there is no function %s", m[1])
		}
	}
	if len(names) < 10 {
		t.Errorf("the walk names %d functions", len(names))
	}
}

// gossip.go begins with a table of contents, which the page repeats.
func TestProtocolPageHasTheSectionsOfTheCode(t *testing.T) {
	_, section, _ := strings.Cut(readFile("docs/protocol.md"), "\n## The code\n")
	section = strings.Join(strings.Fields(section), " ")
	code := readFile("gossip.go")
	var sections []string
	for _, m := range regexp.MustCompile(`(?m)^//\t([a-z-]+(?: [a-z]+)*)  +\S`).FindAllStringSubmatch(code, -1) {
		sections = append(sections, m[1])
		// Those two have other headings.
		if m[1] != "constants" && m[1] != "the loop" && !strings.Contains(code, "\n// ---- "+m[1]+" ----\n") {
			t.Errorf("gossip.go has no section %q, which its contents name", m[1])
		}
	}
	if list := strings.Join(sections, ", "); len(sections) < 10 || !strings.Contains(section, list+".") {
		t.Errorf("the page does not name the sections of gossip.go: %s", list)
	}
}
