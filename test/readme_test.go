package test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// readmeBlocks returns the code blocks of the README in a language.
func readmeBlocks(t *testing.T, language string) (blocks []string) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?s)\n```"+language+"\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		blocks = append(blocks, m[1])
	}
	return blocks
}

// readmeScript makes one script of the README's commands: agents, which a
// reader starts in terminals of their own, run in the background, and make
// targets are only looked up.
func readmeScript(blocks []string) string {
	script, here := "set -e\npids=\ntrap 'kill $pids || :' EXIT\n", false
	for _, line := range strings.Split(strings.Join(blocks, ""), "\n") {
		switch {
		case strings.Contains(line, "<<'END'"):
			here = true
		case here:
			here = line != "END"
		case strings.HasPrefix(line, "make "):
			line = "make -C \"$SOURCE\" -n " + strings.TrimPrefix(line, "make ") + " >/dev/null"
		case strings.HasPrefix(line, "hamlet agent"):
			line += " >>agents.log 2>&1 &\npids=\"$pids $!\""
		}
		if !here && line != "" && !strings.HasPrefix(line, "#") && line != "END" {
			script += fmt.Sprintf("echo '$' %q\n", line)
		}
		script += line + "\n"
	}
	return script + "for i in $(seq 100); do grep -q '^3f2c1aa' agents.log && exit; sleep 0.1; done\n"
}

func TestTheCommandsOfTheReadmeWork(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(program, filepath.Join(dir, "hamlet")); err != nil {
		t.Fatal(err)
	}
	source, _ := os.Getwd()
	script := readmeScript(readmeBlocks(t, "sh"))
	cmd := exec.Command("unshare", "-n", "sh", "-c", "ip link set lo up\n"+script)
	if err := exec.Command("unshare", "-n", "ip", "link", "set", "lo", "up").Run(); err != nil {
		// No network namespace of our own: the default ports must be free.
		l, err := net.Listen("tcp", "127.0.0.1:7373")
		if err != nil {
			t.Skipf("SKIPPED: %v, and no network namespace can be made", err)
		}
		l.Close()
		cmd = exec.Command("sh", "-c", script)
	}
	cmd.Dir = dir
	cmd.Env = append(hamletCmd().Env, "SOURCE="+source, "PATH="+dir+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	logs, _ := os.ReadFile(filepath.Join(dir, "agents.log"))
	if err != nil {
		t.Fatalf("%v\n%s\nagents:\n%s", err, out, logs)
	}
	for _, want := range []string{"web2    127.0.0.3:7946    alive     role=web", `"name": "web1"`, "Graceful leave complete", "web1    127.0.0.2:7946    left"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the session does not show %q:\n%s", want, out)
		}
	}
	if !strings.Contains(string(logs), "New event: user deploy\n3f2c1aa\n") {
		t.Errorf("the handler did not show the event:\n%s", logs)
	}
}

func TestTheReadmeNamesEveryCommandAndItsMakeTargetsExist(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range commandNames(t) {
		if !strings.Contains(string(text), "| `"+name) && name != "version" {
			t.Errorf("the table of commands lacks %s", name)
		}
	}
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("`make ([a-z-]+)").FindAllStringSubmatch(string(text), -1) {
		if !regexp.MustCompile(`(?m)^` + m[1] + `:`).Match(makefile) {
			t.Errorf("the README speaks of make %s, which does not exist", m[1])
		}
	}
	for _, m := range regexp.MustCompile("`(examples/[a-z/.-]+)`").FindAllStringSubmatch(string(text), -1) {
		if _, err := os.Stat(m[1]); err != nil {
			t.Errorf("the README speaks of %v", err)
		}
	}
}
